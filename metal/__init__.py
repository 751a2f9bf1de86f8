"""The kernels, as Metal source; kernels.py reads them from here."""
