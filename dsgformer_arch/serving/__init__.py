"""`dsgformer serve`: a web page and an HTTP API that restore images on this machine.

`service` is the queue with its limits, without HTTP; `api` and `page` are its two front ends; `gate` filters
requests; `server` runs everything with uvicorn.
"""
