"""From preference records to packed batches, with NumPy and Grain alone."""
