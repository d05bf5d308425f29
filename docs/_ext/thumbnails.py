"""A card that leads to a page of gallery/ shows the last figure that was drawn there."""

from docutils import nodes
from sphinx import addnodes
from sphinx.transforms.post_transforms import SphinxPostTransform


class Thumbnails(SphinxPostTransform):
    default_priority = 5  # while a link still says which page it is to

    def run(self, **kwargs):
        for link in list(self.document.findall(addnodes.pending_xref)):
            page = link["reftarget"].lstrip("/")
            if self.env.docname == "gallery" and page.startswith("gallery/"):
                *_, figure = self.env.get_doctree(page).findall(nodes.image)
                thumbnail = nodes.image(uri=figure["uri"], candidates=figure["candidates"], alt="")
                link.parent.parent.insert(link.parent.parent.index(link.parent), thumbnail)


def setup(app):
    app.add_post_transform(Thumbnails)
    return {"parallel_read_safe": True}
