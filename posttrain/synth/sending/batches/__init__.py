"""Requests sent as batches: files of many requests, done within a day at half the price.

`run` is the state machine: `files` are written, `starting` makes batches of them without paying twice, `collecting`
takes in what comes. `service` says where and how; `calls` are HTTP, and `api` OpenAI's endpoints for all that.
"""
