"""Where the published mmca_mgqa package has its layer: `from mmca_ext.attention import SimpleMMCA`."""

from .nn import SimpleMMCA

__all__ = ["SimpleMMCA"]
