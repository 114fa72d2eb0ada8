"""Views: randomised readings of a field, with the parameters that made them."""

from mmrep.views.view import View

__all__ = ["View"]
