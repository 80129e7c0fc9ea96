"""`hansa demo`: a whole market on one machine, with real processes, real jobs and real bookkeeping."""
