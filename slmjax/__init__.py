"""slmjax: training small language models from scratch in JAX. Importing it loads no JAX and touches no device."""

__version__ = "0.1.0"
