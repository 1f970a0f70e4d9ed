"""The web console and HTTP API: one pipeline, a queue of jobs, pages and routes over them.

`studio` joins what the page and the API both do and knows neither; `api` is the HTTP interface,
`page` the Gradio layout, `static/` what runs in the browser, `server` puts them on a port.
"""
