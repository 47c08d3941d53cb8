"""`dsgformer serve`: a page and an API that restore images on this machine.

`service` has the queue and the limits and knows nothing of the web; `api` and `page` are its two front ends;
`server` runs both under uvicorn.
"""
