"""Under everything: refusals, files that are whole or absent, threads, which models exist and where they lie."""
