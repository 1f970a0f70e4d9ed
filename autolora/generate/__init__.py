"""From a request to a picture: prompts and tags, the search index of a pool, denoising, output."""
