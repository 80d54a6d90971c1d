"""Pages of the documentation that are made from the program itself, so that they cannot differ from it."""

from collections.abc import Callable

from reference_pages import command_line, http_interface, python_api, recipes, settings

PAGES: dict[str, Callable[[], str]] = {
    "reference/recipe.md": settings.recipe_page,
    "reference/recipes.md": recipes.page,
    "reference/command_line.md": command_line.page,
    "reference/server.md": settings.server_page,
    "reference/http.md": http_interface.page,
    "reference/python.md": python_api.page,
}
"""What each page is called below docs/, and what gives its Markdown."""
