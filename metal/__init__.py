"""The kernels, as Metal source; blockffn_mlx/kernels/ reads them from here."""
