"""Script: save the source archive of PACKAGE VERSION in FOLDER, without running anything in it.

``pip download`` prepares metadata of a source archive, which runs its code. pip's finder and its
connection (index, credentials, certificates and proxies as configured for pip) do without. They
are pip's internals, alike from 19.3 on; this runs in a process of its own.
"""

from __future__ import annotations

import sys
from pathlib import Path


def main(package: str, version: str, folder: str) -> None:
    """Find the archive and copy it."""
    from pip._internal.commands.download import DownloadCommand

    command = DownloadCommand("download", "")
    with command.main_context():
        options, _ = command.parse_args([])
        session = command.get_default_session(options)
        finder = command._build_package_finder(options, session, ignore_requires_python=True)
        found = [
            candidate.link
            for candidate in finder.find_all_candidates(package)
            if str(candidate.version) == version and not candidate.link.is_wheel
        ]
        if not found:
            sys.exit(f"ERROR: no source archive of {package} {version} found")
        answer = session.get(found[0].url_without_fragment, stream=True)
        answer.raise_for_status()
        with (Path(folder) / Path(found[0].filename).name).open("wb") as sink:
            for chunk in answer.iter_content(1 << 20):
                sink.write(chunk)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except Exception as error:  # one line for the caller, whatever pip or the index says
        sys.exit(f"ERROR: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
