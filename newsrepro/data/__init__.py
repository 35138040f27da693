"""Articles, images and the pairs between them; images from the web."""
