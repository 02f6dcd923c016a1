"""``python -m srd_lab`` is ``srd-lab``."""

from srd_lab.cli.main import main

if __name__ == "__main__":
    main(prog_name="srd-lab")
