"""Language, translation, sentences, cleaning."""
