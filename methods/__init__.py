"""Methods of 4-bit quantisation over one decoder, and the registry that finds them.

A method is named on the command line as `name[:option=value;option=value]`; `a+b` composes. Third parties
add one by an entry point in the group `quantgrid.methods` whose object is a `Method` subclass.
"""

from __future__ import annotations

from methods.registry import method_class, method_classes, parse_method

__all__ = ["method_class", "method_classes", "parse_method"]
