"""Names as links: `softmax_cross_entropy(z, y)` and `jax.jit` lead to what they name, in docstrings and on pages.

A page stays plain Markdown. Names are the public ones of jaxent, and those of others that docs/inventories has. What
stands first in a row of a table is another library's, or what the row is about.
"""

import re

from docutils import nodes
from sphinx import addnodes
from sphinx.ext.intersphinx import InventoryAdapter
from sphinx.transforms import SphinxTransform

import jaxent

PUBLIC = {name for name in vars(jaxent) if not name.startswith("_")}
NAME = re.compile(r"(?:jaxent\.)?([\w.]+)(?:\(|$)")  # alone, or called


def ancestors(node):
    while node := node.parent:
        yield node


def leads_a_row(node):
    return any(isinstance(x, nodes.entry) and x.parent.index(x) == 0 for x in ancestors(node))


class LinkedNames(SphinxTransform):
    default_priority = 400

    def apply(self):
        known = {name for names in InventoryAdapter(self.env).main_inventory.values() for name in names}
        for literal in list(self.document.findall(nodes.literal)):
            match = NAME.match(literal.astext())
            name = match and match[1]
            if name in PUBLIC:
                name = f"jaxent.{name}"
            elif name not in known:
                continue
            parents = set(map(type, ancestors(literal)))
            linked = parents & {nodes.reference, nodes.title, addnodes.pending_xref}
            if linked or leads_a_row(literal) or self.env.docname == f"api/{name}":
                continue
            link = addnodes.pending_xref(
                "",
                refdomain="py",
                reftype="obj",
                reftarget=name,
                refdoc=self.env.docname,
                refwarn=True,
            )
            literal.replace_self(link)
            link += literal


def setup(app):
    app.setup_extension("sphinx.ext.intersphinx")
    app.add_transform(LinkedNames)
    return {"parallel_read_safe": True}
