"""Whether the optional packages are installed that some sources need."""


def check_web_archives() -> None:
    """Raises ValueError with the command to run where a package is absent."""
    try:
        import fastwarc  # noqa: F401
        import resiliparse  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "WarcSourceConfig needs the packages fastwarc and resiliparse: pip install -e '.[warc]' -c constraints.txt"
        ) from error


def check_hub() -> None:
    """Raises ValueError with the command to run where `huggingface_hub` is absent."""
    try:
        import huggingface_hub  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "hf:// addresses and HubSourceConfig need the package huggingface_hub: "
            "pip install -e '.[hub]' -c constraints.txt"
        ) from error
