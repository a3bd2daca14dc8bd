"""How requests reach a server.

`online` sends one by one over many lanes, paced by `limits`, over `transport`; `batch` is the state machine of files
and batches, `batch_api` its wire format. `wires` holds interfaces other than OpenAI's.
"""
