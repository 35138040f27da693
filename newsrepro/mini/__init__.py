"""The generated collections and the small checkpoints that the package ships."""
