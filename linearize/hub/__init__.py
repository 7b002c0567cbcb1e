"""A converted folder on the Hub: its model card, the files that belong, and the upload."""

from .push import Pushed, push

__all__ = ["Pushed", "push"]
