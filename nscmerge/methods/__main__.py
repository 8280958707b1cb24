"""``python -m nscmerge.methods`` prints the table of methods."""

from rich.console import Console

from nscmerge.methods.table import methods_table

if __name__ == "__main__":
    Console().print(methods_table())
