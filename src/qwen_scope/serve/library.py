"""`Library`: the recipes of a server, files of `steer.Recipe` in one folder, named by requests."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from qwen_scope.errors import FormatError, InputError, MismatchError, NotFoundError, check_name, nearest
from qwen_scope.steer import Recipe, load_recipe

from .protocol import fingerprint

SUFFIX = ".json"
MOST_RECIPES = 1000
RECIPE_BYTES = 8 * 10**6


class Library:
    """The folder of recipes that a server was started with; every process of the server reads the same files.

    Everything raises NotFoundError where the server has no such folder.
    """

    def __init__(self, folder: str | None, signature: str, check: Callable[[Recipe], object]) -> None:
        """Nothing is read yet.

        Args:
            signature: of the served model, which a recipe names.
            check: raises where a recipe that is to be kept could not be applied.
        """
        self._folder, self._signature, self._check = folder, signature, check

    @property
    def folder(self) -> Path:
        """Where they are."""
        if self._folder is None:
            raise NotFoundError("this server has no recipes; list `interventions`, or start it with --recipes FOLDER")
        return Path(self._folder)

    def names(self) -> list[str]:
        """All names, in order."""
        return sorted(path.stem for path in self.folder.glob(f"*{SUFFIX}") if not path.name.startswith("."))

    def read(self, name: str) -> Recipe:
        """A recipe.

        Raises:
            NotFoundError: no such recipe.   InputError: no name.
            MismatchError: it is for another model.   FormatError: its file is broken.
        """
        path = self._path(name)
        if not path.is_file():
            known = self.names()
            raise NotFoundError(f"there is no recipe {name!r}" + (f"; {nearest(name, known)}" if known else ""))
        return self._fitting(load_recipe(path, RECIPE_BYTES))

    def write(self, name: str, text: bytes, suffix: str = SUFFIX) -> Recipe:
        """Keep a recipe under a name, in place of what had it; `text` is a file as `--recipe` takes it.

        Raises:
            FormatError, InputError, NotFoundError, MismatchError: a text that is no recipe of this model, or one that
                this server could not apply.
        """
        path = self._path(name)
        if len(text) > RECIPE_BYTES:
            raise FormatError(f"a recipe of {len(text):,} bytes is too large; at most {RECIPE_BYTES:,} are read")
        if not path.exists() and len(self.names()) >= MOST_RECIPES:
            raise InputError(f"this server keeps at most {MOST_RECIPES} recipes; delete one")
        with tempfile.TemporaryDirectory() as folder:
            given = Path(folder, f"{name}{suffix}")
            given.write_bytes(text)
            recipe = self._fitting(load_recipe(given, RECIPE_BYTES))
        self._check(recipe)
        replace(recipe, name=name).save(path)
        return recipe

    def delete(self, name: str) -> None:
        """Forget a recipe.

        Raises:
            NotFoundError: no such recipe.   InputError: no name.
        """
        try:
            os.unlink(self._path(name))
        except FileNotFoundError:
            raise NotFoundError(f"there is no recipe {name!r}") from None

    def _path(self, name: str) -> Path:
        return self.folder / f"{check_name('a recipe', name)}{SUFFIX}"

    def _fitting(self, recipe: Recipe) -> Recipe:
        if recipe.model != self._signature:
            raise MismatchError(
                f"the recipe {recipe.name!r} is for the model {recipe.model}, this is {self._signature}"
            )
        return recipe


def summary(name: str, recipe: Recipe) -> dict[str, object]:
    """A recipe in a list."""
    return {
        "name": name,
        "fingerprint": fingerprint(recipe.interventions),
        "interventions": len(recipe.interventions),
        "layers": sorted({one.layer for one in recipe.interventions}),
        "provenance": recipe.provenance,
    }
