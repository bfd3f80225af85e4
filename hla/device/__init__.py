"""Between the programs of the core and the kernels of a backend; knows no array library."""
