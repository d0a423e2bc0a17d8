"""What every part needs and none of the rest knows: runs, jobs, caches, files, processes, random numbers."""
