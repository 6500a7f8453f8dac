"""Things that are made before or beside a model: tokenizers, text corpora, their manifests.

Nothing here knows the model code; training, evaluation and serving all may import it.
"""
