"""The same as blockffn-convert, run from a checkout: python convert.py --hf-path ..."""

from blockffn_mlx.cli.launch import convert

if __name__ == "__main__":
    raise SystemExit(convert())
