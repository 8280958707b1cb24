"""``python -m nscmerge`` is the console script ``nscmerge``."""

from nscmerge.cli import main

if __name__ == "__main__":
    main()
