"""How the site is built: `make docs`, without a network."""

import sys
from pathlib import Path

import jacops

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

BASE_ADDRESS = ""  # where the site will stand, with a slash at the end; absolute links and the site map need it

project = "jacops"
author = copyright = "The jacops authors"
release = version = jacops.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_design",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
    "docstrings",
    "mathml",
    "reference",
]
exclude_patterns = ["_build", "_ext", "tutorials/*.ipynb"]
suppress_warnings = ["config.cache", "misc.highlighting_failure"]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "attrs_inline"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

sphinx_gallery_conf = {
    "examples_dirs": "../examples/tutorials",
    "gallery_dirs": "tutorials",
    "filename_pattern": r"\.py$",
    "within_subsection_order": "FileNameSortKey",
    "image_scrapers": ("figures.scrape",),
    "image_srcset": ["2x"],
    "ignore_repr_types": r"matplotlib",
    "download_all_examples": False,
    "show_memory": False,
    "min_reported_time": 0,
    "remove_config_comments": True,
    "plot_gallery": True,
    "abort_on_example_error": True,
    "nested_sections": False,
    "show_signature": False,
}

html_theme = "furo"
html_title = "jacops"
html_baseurl = BASE_ADDRESS
html_static_path = ["_static"]
html_css_files = ["jacops.css"]
html_math_renderer = "mathml"
html_show_sphinx = False
html_copy_source = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
