"""Where trials run: in worker processes under Ray, or in this process."""
