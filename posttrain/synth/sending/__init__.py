"""How requests reach a server.

`service` says what a server is asked and how. `online` sends one by one over many lanes, paced by `limits`: `attempts`
sends a request once, to one of the `endpoints`, over `transport`; `outcomes` records what came, and `refusals` say when
it is the task that is wrong; `ending` ends the run, and so does a `silence` that lasts too long. `batches` sends many
requests as one file. `wires` holds interfaces other than OpenAI's.
"""
