"""Step times of training jobs: measured tables, a model fitted to them, and what it predicts.

`table` reads measurements, `form` is the closed form of one site's step, `fit` fits it to a table,
`pollux` is the published form as a reference, `intervals` says how far off a prediction may be,
`model` keeps all of it in a document, `evaluation` scores it, and `intersite` adds the tier between
sites. No torch: scipy's solver and numpy do.
"""
