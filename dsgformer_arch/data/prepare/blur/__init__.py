"""Synthesis of pairs of blurred and sharp images, in the order of the physical process.

    photographs.py   sharp photographs, reduced in linear light      frames.py     runs of video frames
    response.py      display levels to linear light and back         settings.py   settings as data
    shake.py         a camera that moves in six degrees of freedom   objects.py    objects that move over it
    realism.py       saturation, noise, colours, demosaicing, JPEG   sources.py    sources of pairs

docs/blur.md explains and shows the stages.
"""
