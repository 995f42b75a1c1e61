"""Looking inside: attention at any length, the cache map and the diagnostics, as functions from captures to
arrays.

Import from the modules: ``capture`` (what the engine remembers), ``view`` (the map), ``heads`` (statistics
and
thumbnails of every head), ``cachemap`` (what the cache did to each token) and ``diagnostics`` (the
literature's probes).
Nothing here draws, stores or loads a model.
"""
