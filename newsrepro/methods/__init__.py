"""One module a method, each exported from the notebook that makes its tables."""
