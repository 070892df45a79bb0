"""Names that collide: Hugging Face's distribution `kernels` and this project's folder of that name."""

import sys
from importlib import metadata

from methods.errors import UserError


def refuse_foreign_kernels() -> None:
    """Stop when a distribution called `kernels` is installed. Entry points call this before any other import.

    Installed, that distribution and this project overwrite each other's folder; run from the repository,
    `transformers` reads its version, finds this project's folder under its name and fails deep inside an
    import. Only the metadata is read, nothing is imported. Raises UserError.
    """
    for found in metadata.distributions(name="kernels"):
        raise UserError(
            f"the installed distribution 'kernels' {found.version} takes the name of a package of quantgrid; "
            f"remove it with: {sys.executable} -m pip uninstall kernels"
        )
