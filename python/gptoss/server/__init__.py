"""An OpenAI-compatible HTTP server over one model. Needs the extra `serve`.

`app.create_app` puts it together; docs/serving.md is for those who run it.

From the outside in: serve.py (uvicorn, what a connection may do), safety.py (what a request may do:
key, host, origin, sizes, times; logs and errors), app.py (routes), completions.py, chat.py and
responses.py (one endpoint each: JSON in, JSON or events out), generation.py (a parsed request to
engine requests), driver.py (the engine's thread and asyncio).
"""
