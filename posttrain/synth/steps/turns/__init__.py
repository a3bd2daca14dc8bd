"""Steps of several turns: `converse` (tools, a simulated user), and `search` over steps of a solution.

`tools` are Python functions, `mcp` those of a server process; `toolbox` puts both before a model. `tree` is what a
search goes through.
"""
