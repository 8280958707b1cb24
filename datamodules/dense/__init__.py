"""What the dense vision data sets share: reading maps, checking lists and files, transforms, boundary maps.

Raises:
    ConfigError: On import, where a package of the extra ``dense`` is missing.
"""

from importlib.util import find_spec

from nscmerge.errors import ConfigError

_PACKAGES = {"PIL": "pillow", "scipy": "scipy", "skimage": "scikit-image"}

if _missing := [name for module, name in _PACKAGES.items() if find_spec(module) is None]:
    raise ConfigError(
        f"dense data sets need {', '.join(_missing)}, which is not installed. Run: pip install 'nscmerge[dense]'"
    )
