"""Which library a disk's URI is for; known without it, so that its absence is told last."""

from vhostpy.errors import ConfigError

LIBRARIES = {
    "nbd": "libnbd",
    "nbds": "libnbd",
    "nbd+unix": "libnbd",
    "nbds+unix": "libnbd",
    "nbd+vsock": "libnbd",
    "nbds+vsock": "libnbd",
    "rbd": "librbd",
}


def library_of(uri: str) -> str:
    """Raises ConfigError where no storage knows the URI's scheme."""
    scheme, colon, _ = uri.partition(":")
    if not colon or scheme not in LIBRARIES:
        what = f"{scheme!r} is no kind of disk that we know" if colon else "no URI"
        raise ConfigError(
            f"{uri}: {what}",
            "e.g. nbd://localhost/export, nbd+unix:///?socket=/tmp/nbd or rbd:pool/image; "
            "a file: --file",
        )
    return LIBRARIES[scheme]
