"""The documentation site: `sphinx-build -W -n docs docs/_build`."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent / "_ext"), str(Path(__file__).parents[1])]

project = "deploypipe"
copyright = "the deploypipe authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton", "reference_pages"]
exclude_patterns = ["_build", "_generated"]
html_theme = "furo"
html_title = "deploypipe"

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
autodoc_typehints = "none"  # signatures of ten types are unreadable; the docstrings say what goes in
