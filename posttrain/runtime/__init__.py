"""What surrounds a run.

`launch` makes one Fabric under every launcher; `metrics` are what steps log; `folder` is the run's folder and whose it
is; `signals`, `failures`, `crash` and `watchdog` are what happens when something ends or hangs.
"""
