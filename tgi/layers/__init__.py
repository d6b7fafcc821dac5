"""Building blocks of the models. Sharding and quantization live here and never in a model's forward."""
