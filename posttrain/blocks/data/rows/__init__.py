"""What a row says: from columns to text and the parts of it that are trained.

`formats` reads rows from files; `schemas` and `pairs` find the conversations in a row, `messages` reads one message of
any format; `chat` renders them with the model's own template, `markers` and `spans` tell where each message ended up.
"""
