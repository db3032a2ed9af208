"""A fitted model: its parts, its event table, its folder, the hub."""

from userip_fast.model.fitted import Model

__all__ = ["Model"]
