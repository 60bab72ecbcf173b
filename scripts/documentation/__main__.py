"""The documentation behind scripts/docs: writes the generated files, and builds the site."""

import argparse
import functools
import http.server
import sys

import generate
import site_builder


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="scripts/docs", description="Write the reference and build the site of docs/."
    )
    parser.add_argument("--reference", action="store_true", help="only write the files that are made from the code")
    parser.add_argument("--build", action="store_true", help="only build the site")
    parser.add_argument("--serve", action="store_true", help="serve the site at http://127.0.0.1:8000 after the build")
    options = parser.parse_args()
    if not options.build:
        generate.write_files()
    if options.reference:
        return
    try:
        site = site_builder.build(generate.ROOT)
    except site_builder.BrokenSite as fault:
        sys.exit(str(fault))
    print(f"{site.relative_to(generate.ROOT)}/index.html: the site is built, every link leads somewhere")
    if options.serve:
        handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=site)
        http.server.ThreadingHTTPServer(("127.0.0.1", 8000), handler).serve_forever()


if __name__ == "__main__":
    main()
