"""What a campaign costs besides training, and what many trials reach together: `python -m tune.bench NAME --json`.

All of them run the real thing, campaigns through the same code as run_campaign.py and training steps through the train
loop's, in a temporary folder.
"""
