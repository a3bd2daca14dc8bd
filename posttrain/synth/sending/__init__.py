"""How requests reach a server.

`service` says what a server is asked and how. `online` sends one by one over many lanes, paced by `limits`, to
`endpoints` that answer, over `transport`, until `refusals` say that it is the task that is wrong; `batch` is the state
machine of files and batches, `batch_api` its wire format. `wires` holds interfaces other than OpenAI's.
"""
