"""Results in an object store: a local folder that is uploaded while a campaign runs, and restored elsewhere."""
